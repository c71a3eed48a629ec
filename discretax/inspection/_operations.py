"""How many floating point operations a traced program does, and which layer does them.

The program is what JAX has traced: every operation is there, with the shapes it is done on, and loops say
how often they turn. What depends on the parameters alone is not counted: it is done once, and not for each
sample.
"""

import collections
import functools as ft
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from discretax.inspection._layers import SCOPE, Layer
from discretax.ops._running.dispatch import plain_form


class Origin(NamedTuple):
    """What a value is made of: of samples or a cache, or else of parameters, those of one layer if it has
    an `owner`. `number` is known for the bound of a loop."""

    moving: bool = False
    owner: int | None = None
    number: Any = None


CONSTANT = Origin()
MOVING = Origin(moving=True)

ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp"),
    *("floor", "ceil", "round", "sqrt", "rsqrt", "cbrt", "square", "pow", "integer_pow"),
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "erf", "erfc", "erf_inv", "lgamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}
ADDING = {"scatter-add", "scatter_add"}


def operations_by_layer(
    program: ClosedJaxpr, origins: Sequence[Origin], layers: Sequence[Layer]
) -> list[float]:
    """Of each layer, without those within it; `origins` are those of the program's arguments."""
    counter = _Counter(layers)
    counter.walk(program.jaxpr, list(origins), 0, 1)
    return [counter.counts[i] for i in range(len(layers))]


class _Counter:
    def __init__(self, layers: Sequence[Layer]):
        self.layers = layers
        self.counts: Any = collections.Counter()  # which takes floats too

    def walk(self, jaxpr: Jaxpr, arguments: list[Origin], layer: int, times: float) -> list[Origin]:
        """Counts what `jaxpr` does `times` times for the `layer`; where its results come from."""
        known = dict(zip(jaxpr.invars, arguments, strict=True))

        def origin(variable):
            if isinstance(variable, Literal):
                return Origin(number=variable.val)
            return known.get(variable, CONSTANT)

        for equation in jaxpr.eqns:
            inputs = [origin(variable) for variable in equation.invars]
            scopes = SCOPE.findall(str(equation.source_info.name_stack))
            here = int(scopes[-1]) if scopes else layer
            outputs = self.visit(equation, inputs, here, times)
            known |= zip(equation.outvars, outputs, strict=True)
        return [origin(variable) for variable in jaxpr.outvars]

    def visit(
        self, equation: JaxprEqn, inputs: list[Origin], layer: int, times: float
    ) -> list[Origin]:
        name, parameters = equation.primitive.name, equation.params
        if name == "scan":
            return self.scan(parameters, inputs, layer, times)
        if name == "while":
            return self.loop(parameters, inputs, layer, times)
        if name == "cond":
            return self.branches(parameters["branches"], inputs[1:], layer, times)
        inner = _inner(equation)
        if inner is not None:
            return self.walk(inner, inputs, layer, times)
        made = _made_of(inputs)
        if made.moving:
            self.counts[self._responsible(inputs, layer)] += times * _operations(equation)
        elif name in ("convert_element_type", "copy", "broadcast_in_dim"):
            made = made._replace(number=inputs[0].number)
        return [made] * len(equation.outvars)

    def _responsible(self, inputs: list[Origin], layer: int) -> int:
        """The one whose parameters are used, if it is within the one that computes."""
        owners = {each.owner for each in inputs if each.owner is not None}
        within = {owner for owner in owners if layer < owner < self.layers[layer].end}
        return within.pop() if len(within) == 1 else layer

    def scan(self, parameters, inputs, layer, times):
        body = parameters["jaxpr"].jaxpr
        constants, carries = parameters["num_consts"], parameters["num_carry"]
        fixed, carried, scanned = (
            inputs[:constants],
            inputs[constants : constants + carries],
            inputs[constants + carries :],
        )
        run = lambda carried, times: self.walk(body, [*fixed, *carried, *scanned], layer, times)
        carried = _settled(lambda carried: run(carried, 0)[:carries], carried)
        return run(carried, times * parameters["length"])

    def loop(self, parameters, inputs, layer, times):
        condition, body = parameters["cond_jaxpr"].jaxpr, parameters["body_jaxpr"].jaxpr
        of_condition, of_body = parameters["cond_nconsts"], parameters["body_nconsts"]
        tested, fixed = inputs[:of_condition], inputs[of_condition:][:of_body]
        carried = inputs[of_condition + of_body :]
        turns = _turns(condition, [*tested, *carried])
        run = lambda carried, times: self.walk(body, [*fixed, *carried], layer, times)
        carried = _settled(lambda carried: run(carried, 0), carried)
        return run(carried, times * turns)

    def branches(self, branches, inputs, layer, times):
        """Those of the branch that does most."""
        most, made = collections.Counter(), []
        for branch in branches:
            counter = _Counter(self.layers)
            made.append(counter.walk(branch.jaxpr, inputs, layer, times))
            most = max(most, counter.counts, key=collections.Counter.total)
        self.counts.update(most)
        return [_made_of(outputs) for outputs in zip(*made, strict=True)]


def _made_of(inputs: Sequence[Origin]) -> Origin:
    if any(each.moving for each in inputs):
        return MOVING
    owners = {each.owner for each in inputs if each.owner is not None}
    return Origin(owner=owners.pop() if len(owners) == 1 else None)


def _settled(turn: Callable[[list[Origin]], list[Origin]], carried: list[Origin]) -> list[Origin]:
    """What is carried from turn to turn, once samples have got everywhere that they get."""
    while True:
        after = [_made_of(pair) for pair in zip(carried, turn(carried), strict=True)]
        if [each.moving for each in after] == [each.moving for each in carried]:
            return after
        carried = after


def _turns(condition: Jaxpr, inputs: list[Origin]) -> int:
    """Of a loop over whole numbers, from one that is known to another."""
    known = dict(zip(condition.invars, inputs, strict=True))
    numbers = [
        v.val if isinstance(v, Literal) else known.get(v, CONSTANT).number
        for v in (condition.eqns[0].invars if len(condition.eqns) == 1 else ())
    ]
    if len(numbers) != 2 or None in numbers or condition.eqns[0].primitive.name != "lt":
        raise ValueError(
            "this model has a loop whose number of turns is known when it runs, and not before, so "
            "that its operations cannot be counted. Give an example `x` of fewer samples."
        )
    start, end = map(int, numbers)
    return max(0, end - start)


def _inner(equation: JaxprEqn) -> Jaxpr | None:
    """The program of a call, or, of an operation of the library, how it is computed without a kernel."""
    form = plain_form(equation.primitive)
    if form is not None:
        arrays = [variable.aval for variable in equation.invars]
        return jax.make_jaxpr(ft.partial(form, **equation.params))(*arrays).jaxpr
    return next(_programs(equation.params.values(), len(equation.invars)), None)


def _programs(values: Any, arguments: int) -> Iterator[Jaxpr]:
    for value in values:
        jaxpr = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(jaxpr, Jaxpr) and len(jaxpr.invars) == arguments:
            yield jaxpr


def _operations(equation: JaxprEqn) -> float:
    """A multiplication and an addition count two; `exp`, `tanh` and the like one. To move, convert,
    compare or choose is none."""
    name = equation.primitive.name
    arrays: list[Any] = [variable.aval for variable in equation.invars]
    result: Any = equation.outvars[0].aval
    if not jnp.issubdtype(result.dtype, jnp.inexact):
        return 0
    is_complex = jnp.issubdtype(result.dtype, jnp.complexfloating)
    first = arrays[0]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        each = math.prod(first.shape[axis] for axis in contracted)
        return 2 * result.size * each * (4 if is_complex else 1)
    if name == "conv_general_dilated":
        kernel = arrays[1]
        outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * result.size * kernel.size / outputs
    if name in ELEMENTWISE:
        return result.size * (_of_complex(name) if is_complex else 1)
    if name in REDUCTIONS:
        return first.size - result.size
    if name in CUMULATIVE:
        return first.size
    if name in ADDING:
        return arrays[2].size
    if name == "fft":
        size = math.prod(equation.params["fft_lengths"])
        is_real = "RFFT" in str(equation.params["fft_type"])
        of_each = (2.5 if is_real else 5) * size * math.log2(max(size, 2))
        return of_each * max(first.size, result.size) / size
    if name == "triangular_solve":
        return result.size * first.shape[-1]
    return 0


def _of_complex(name: str) -> int:
    return 6 if name in ("mul", "div") else 2
