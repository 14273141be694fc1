"""The chat: what is opened, who answers, the conversation and its cache, the commands, and the whole of it."""
