"""Integrations into training programs: events and callbacks, and the patch of open_clip."""
