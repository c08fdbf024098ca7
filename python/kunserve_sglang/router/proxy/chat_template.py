"""The model's chat template, in the environment that transformers gives to it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
import jinja2.sandbox

from kunserve_sglang.core.prompt_format import PromptFormat

_OF_MEDIA = ("image", "audio", "video", "vision")
_MESSAGES = ("message", "msg", "m")


class ChatTemplate:
    """Renders chats; `in_parts` says that it goes through the parts of a message's content."""

    def __init__(self, form: PromptFormat) -> None:
        """Raises what reading and compiling raise."""
        folder = Path(form.folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        source = _source(form, folder, config)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.in_parts = _goes_through_parts(source, environment)
        self._template = environment.from_string(source)
        self._special = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        more: dict[str, Any],
    ) -> str:
        """With further variables of the request. Raises what the template raises."""
        try:
            return self._render(messages, tools, more)
        except Exception:
            if not tools:
                raise
            # As SGLang does: some templates want functions without what is around them.
            return self._render(messages, [tool["function"] for tool in tools], more)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        more: dict[str, Any],
    ) -> str:
        given = {"messages": messages, "tools": tools, "documents": None}
        return self._template.render(
            **{**self._special, **given, "add_generation_prompt": True, **more}
        )


def _source(form: PromptFormat, folder: Path, config: dict[str, Any]) -> str:
    given = form.chat_template
    file = Path(given) if given else folder / "chat_template.jinja"
    if given and file.suffix != ".jinja":
        raise ValueError(f"{given} is no file of jinja2")
    source = file.read_text() if given or file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if not isinstance(source, str):
        raise ValueError(f"no chat template in {folder}")
    return source


def _goes_through_parts(source: str, environment: jinja2.Environment) -> bool:
    """By SGLang's rule, which is vLLM's: by its words, or a loop over the content of a message."""
    if any(word in source for word in _OF_MEDIA):
        return True
    loops = environment.parse(source).find_all(jinja2.nodes.For)
    return any(_is_content(loop.iter) for loop in loops)


def _is_content(node: jinja2.nodes.Node) -> bool:
    """Whether it is `message.content`, filtered, tested or cut in whatever way."""
    match node:
        case jinja2.nodes.Filter(node=inner) | jinja2.nodes.Test(node=inner):
            return inner is not None and _is_content(inner)
        case jinja2.nodes.Getitem(node=inner, arg=jinja2.nodes.Slice()):
            return _is_content(inner)
        case jinja2.nodes.Getitem(node=inner, arg=jinja2.nodes.Const(value="content")):
            return _is_message(inner)
        case jinja2.nodes.Getattr(node=inner, attr="content"):
            return _is_message(inner)
    return False


def _is_message(node: jinja2.nodes.Node) -> bool:
    return isinstance(node, jinja2.nodes.Name) and node.name in _MESSAGES and node.ctx == "load"


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    """Not jinja2's, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
