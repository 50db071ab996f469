"""The settings of a reply as form fields, made from their pydantic models."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.talking.answers import ReplySettings

_FIRST = ("want", "seed")


class Knobs:
    """Form fields for every number, choice and text of ReplySettings, grouped by section.

    Build it inside a `gr.Blocks`; `fields` are the inputs whose values `settings` takes.
    """

    def __init__(self, defaults: ReplySettings) -> None:
        self._defaults = defaults
        self._places: list[tuple[str | None, str]] = []
        self.fields: list[gr.components.Component] = []
        model = type(defaults)
        for name in _FIRST:
            self._add(None, name, model.model_fields[name], getattr(defaults, name))
        rest = [name for name in model.model_fields if name not in _FIRST]
        for name in rest:
            value = getattr(defaults, name)
            if not isinstance(value, BaseModel):
                self._add(None, name, model.model_fields[name], value)
        for name in rest:
            section = getattr(defaults, name)
            if isinstance(section, BaseModel):
                with gr.Accordion(name.capitalize(), open=False):
                    for inner, field in type(section).model_fields.items():
                        if inner != "batch_size":  # speed alone
                            self._add(name, inner, field, getattr(section, inner))

    def settings(self, values: Sequence[Any]) -> ReplySettings:
        """The form's content; ValueError names the field that is not right."""
        raw = self._defaults.model_dump()
        for (section, name), value in zip(self._places, values, strict=True):
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            (raw if section is None else raw[section])[name] = value
        try:
            return type(self._defaults).model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def _add(self, section: str | None, name: str, field: FieldInfo, value: Any) -> None:
        component = _component(name, field, value)
        if component is not None:
            self._places.append((section, name))
            self.fields.append(component)


def _component(name: str, field: FieldInfo, value: Any) -> gr.components.Component | None:
    """A form field, or None for a type that has none."""
    kinds = _kinds(field.annotation)
    about: dict[str, Any] = {"label": name.replace("_", " "), "info": field.description}
    literal = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    if literal is not None:
        choices = list(get_args(literal))
        pick = gr.Radio if name in _FIRST else gr.Dropdown
        return pick(choices, value=value, **about)
    if bool in kinds:
        return gr.Checkbox(value=bool(value), **about)
    if int in kinds or float in kinds:
        limits: dict[str, Any] = {}
        for rule in field.metadata:
            if isinstance(rule, Ge | Gt):
                limits["minimum"] = getattr(rule, "ge", None) or getattr(rule, "gt", None) or 0
            if isinstance(rule, Le | Lt):
                limits["maximum"] = getattr(rule, "le", None) or getattr(rule, "lt", None)
        step = 1 if float not in kinds else 0.1
        return gr.Number(value=value, step=step, **limits, **about)
    if str in kinds:
        return gr.Textbox(value=value, **about)
    return None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation, without None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)
