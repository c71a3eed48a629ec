"""For the API pages: shapes in signatures as the code has them, `Float[Array, "time *state"]`.

Griffe takes their words for code, and the star before a word for a product.
"""

import ast

import griffe


class AnnotationsAsWritten(griffe.Extension):
    def on_function_instance(
        self, *, node: ast.AST | griffe.ObjectNode, func: griffe.Function, **kwargs: object
    ) -> None:
        if not isinstance(node, ast.FunctionDef):
            return
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation is not None:
                func.parameters[argument.arg].annotation = ast.unparse(argument.annotation)
        if node.returns is not None:
            func.returns = ast.unparse(node.returns)
