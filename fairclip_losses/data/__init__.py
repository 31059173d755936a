"""Reading tables: protected attributes, pair ids and class labels."""

from .groups import MAX_GROUPS, UNKNOWN, CodeBook, write_text
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
