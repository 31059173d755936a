"""Reading tables: protected attributes, pair ids and class labels."""

from __future__ import annotations

from .files import write_text
from .groups import MAX_GROUPS, UNKNOWN, CodeBook
from .tables import Table, encode_attributes, encode_labels, pair_ids, read_table, write_table

__all__ = [
    "MAX_GROUPS",
    "UNKNOWN",
    "CodeBook",
    "Table",
    "encode_attributes",
    "encode_labels",
    "pair_ids",
    "read_table",
    "write_table",
    "write_text",
]
