"""How much the service takes on: every setting, from a YAML file or from options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from gill_errors import InputError
from gill_records import Record
from pipeline.talking.remote_pictures import RemotePictureSettings


class RequestLimits(Record):
    """How much one request may ask for. A history beyond it is forgotten, oldest first."""

    max_body_bytes: int = Field(16_000_000, ge=1, description="bytes of a request")
    max_characters: int = Field(20_000, ge=1, description="characters of all its texts")
    max_pictures: int = Field(8, ge=0, description="pictures in it")
    max_pixels: int = Field(
        48_000_000, ge=1, description="pixels of all its pictures, see `open_picture`: 4 bytes each"
    )
    max_tokens: int = Field(256, ge=1, description="tokens of an answer; more is clamped")
    max_images: int = Field(4, ge=1, description="pictures in an answer")
    max_candidates: int = Field(4, ge=1, description="pictures generated for one that is shown")
    max_steps: int = Field(100, ge=1, description="denoising steps of a picture")
    max_guidance: float = Field(50.0, ge=1, description="guidance of a picture")


class ServiceSettings(Record):
    """How much the service takes on."""

    model: str = Field("gill", min_length=1, description="the name that requests give")
    max_requests: int = Field(
        48, ge=1, description="requests that are read, wait or are answered at one time"
    )
    max_waiting: int = Field(32, ge=1, description="requests in line")
    max_batch: int = Field(8, ge=1, description="requests answered together")
    timeout_s: float = Field(120.0, gt=0, description="seconds for a request, the line included")
    header_timeout_s: float = Field(
        10.0, gt=0, description="seconds for the head of a request, from its connection on"
    )
    body_timeout_s: float = Field(15.0, gt=0, description="seconds for a request to arrive")
    picture_seconds: float = Field(600.0, gt=0, description="how long returned names are good")
    picture_bytes: int = Field(200_000_000, ge=1, description="bytes of all pictures kept so")
    prefix_bytes: int = Field(
        500_000_000,
        ge=0,
        description="keys and values of conversations that are kept for their next requests",
    )
    seen_pictures: int = Field(
        2000, ge=0, description="pictures whose visual vectors are kept for the next requests"
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description='web pages that may call, as "https://example.org"; "*": all'
    )
    limits: RequestLimits = RequestLimits()
    remote: RemotePictureSettings = RemotePictureSettings()


def read_settings(file: Path | None, **options: Any) -> ServiceSettings:
    """The settings of a YAML file, with `options` laid over them where they are not None.

    `limits_NAME` and `remote_NAME` are those of `limits` and `remote`. Raises InputError for a file
    that cannot be read, and for a setting that does not exist or may not be so.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"{file} cannot be read: {reason}") from None
        if not isinstance(settings, dict):
            raise InputError(f"{file}: expected settings by name, found {settings!r:.60}")
    for name, value in options.items():
        if value is not None:
            part, _, inner = name.partition("_")
            if part in ("limits", "remote"):
                settings[part] = {**(settings.get(part) or {}), inner: value}
            else:
                settings[name] = value
    try:
        return ServiceSettings.model_validate(settings)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']} (found {one['input']!r:.60})"
            for one in error.errors(include_url=False)
        ]
        raise InputError(f"{file or 'options'}: {'; '.join(lines)}") from None
