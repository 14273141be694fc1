from typing import Any

class JITFunction:
    arg_names: list[str]
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
