"""Initialisations of recurrences."""

from discretax.init._ring import ring as ring
