"""From a config to attachments: which sites of a program get which method."""
