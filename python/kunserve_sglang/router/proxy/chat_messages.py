"""Messages, tool calls and tools as SGLang hands them to a chat template.

Clients write the same thing in several ways: content as a text or in parts, the arguments of a tool
call as JSON in a string, fields in any order. SGLang brings all that into one form, with fields in
an order of its own, before it renders it; so must whoever wants to know what tokens become of it.

A picture becomes as many tokens as only its model knows. Here it becomes a text with a hash of
where it is or of what it holds: what comes before it is found in caches, and what comes after it
where the same picture was sent.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec


class _Url(msgspec.Struct):
    url: str


class _ContentPart(msgspec.Struct):
    """A part of a message; a `tool_reference` has a `name`."""

    type: str
    text: str | None = None
    image_url: _Url | None = None
    video_url: _Url | None = None
    audio_url: _Url | None = None
    name: str | None = None

    def described(self, *, in_parts: bool) -> dict[str, Any] | None:
        """As a template gets it; None for what it does not get."""
        if self.type == "text":
            if self.text is None:
                raise ValueError("a part that is a text has none")
            return {"type": "text", "text": self.text}
        if self.type == "tool_reference":
            return {"type": self.type, "name": self.name}
        for media in (self.image_url, self.video_url, self.audio_url):
            if media is not None and in_parts:
                digest = hashlib.sha256(media.url.encode()).hexdigest()
                return {"type": "text", "text": f"<{self.type} {digest}>"}
        return None


class _CalledFunction(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None

    def described(self, *, of_assistant: bool) -> dict[str, Any]:
        """Raises `msgspec.DecodeError` for arguments that are no JSON, as SGLang refuses them."""
        arguments: Any = self.arguments
        if of_assistant and isinstance(arguments, str):
            arguments = msgspec.json.decode(arguments, type=dict[str, Any])
        return {"name": self.name, "arguments": arguments}


class _ToolCall(msgspec.Struct):
    function: _CalledFunction
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"

    def described(self, *, of_assistant: bool) -> dict[str, Any]:
        function = self.function.described(of_assistant=of_assistant)
        return {"id": self.id, "index": self.index, "type": self.type, "function": function}


class Message(msgspec.Struct):
    """One of a chat, as clients send it; those of users have a role and content, nothing else."""

    role: str
    content: str | list[_ContentPart] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tools: Any = None

    def described(self, *, in_parts: bool) -> dict[str, Any]:
        """As a template gets it, one that goes through the parts of a content or wants one text.

        Raises `ValueError` for what SGLang refuses.
        """
        if self.tools:
            raise ValueError("a message has tools of its own")
        role = self.role.lower()
        message: dict[str, Any] = {"role": role, "content": self._content(role, in_parts=in_parts)}
        if role == "user":
            return message
        for name in ("tool_call_id", "name", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls is not None:
            own = role == "assistant"
            message["tool_calls"] = [call.described(of_assistant=own) for call in self.tool_calls]
        return message

    def _content(self, role: str, *, in_parts: bool) -> str | list[dict[str, Any]]:
        if not isinstance(self.content, list):
            return self.content or ""
        described = (part.described(in_parts=in_parts) for part in self.content)
        parts = [part for part in described if part is not None]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        one_text = not in_parts or (role == "tool" and len(texts) == len(parts))
        return " ".join(texts) if one_text else parts


class _Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: Any = None
    strict: bool = False
    defer_loading: bool | None = None


class Tool(msgspec.Struct):
    """A tool that a model may call."""

    function: _Function
    type: str = "function"
    defer_loading: bool | None = None

    def described(self) -> dict[str, Any]:
        """As a template gets it."""
        own, loading = self.function, self.function.defer_loading
        loading = self.defer_loading if loading is None else loading
        function: dict[str, Any] = {
            "description": own.description,
            "name": own.name,
            "parameters": own.parameters,
            "strict": own.strict,
        }
        if loading is not None:
            function["defer_loading"] = loading
        return {"type": self.type, "function": function, "defer_loading": self.defer_loading}


class _Named(msgspec.Struct):
    name: str | None = None


class ToolChoice(msgspec.Struct):
    """The one tool that has to be called."""

    function: _Named


def tools_for(
    tools: list[Tool] | None, choice: str | ToolChoice | None
) -> list[dict[str, Any]] | None:
    """Those that a template gets; None for none."""
    if not tools or choice == "none":
        return None
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    return [tool.described() for tool in tools]


def as_asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat that ends with a text of the assistant ends with one of the user instead."""
    last = messages[-1]
    if last["role"] == "assistant" and isinstance(last["content"], str):
        return [*messages[:-1], {"role": "user", "content": last["content"]}]
    return messages
