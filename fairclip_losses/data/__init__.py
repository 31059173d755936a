"""Reading tables: protected attributes, pair ids and class labels."""

from .groups import MAX_GROUPS, UNKNOWN, CodeBook, encode_attributes, encode_labels
from .tables import Table, pair_ids, read_table, write_table, write_text

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
