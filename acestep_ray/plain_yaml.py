"""YAML as settings need it: a short file cannot become gigabytes of memory, and no tag makes an object."""

from __future__ import annotations

from typing import Any

import yaml

from acestep_ray.plain_text import decode_text


class _Loader(yaml.SafeLoader):
    """Aliases of aliases grow with every level, and `<<` copies what they name."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "an alias (`*name`) is not read; write out what it stands for",
                self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)


def load_yaml(content: str | bytes) -> Any:
    """What `content` says: mappings, lists, texts, numbers. Raises YAMLError, also for aliases and endless nesting."""
    try:
        text = content if isinstance(content, str) else decode_text(content)
        return yaml.load(text.removeprefix("\ufeff"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"it is not UTF-8 text ({error})") from None
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
