"""Building blocks of passes: programs opened for edits, ops, methods, attachments, regions, effects and costs."""
