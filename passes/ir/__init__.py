"""What passes are made of: programs opened for edits, ops, methods, attachments, regions, effects, costs."""
