"""Settings that all services share. Each service adds its own in its `settings.py`.

Every field is read from the environment variable PENSTOCK_<FIELD IN CAPITALS>; a field `x` may also be
given as PENSTOCK_X_FILE, the path of a file that holds the value (for secrets).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from penstock_kit.errors import InvalidArgument

ENV_PREFIX = "PENSTOCK_"


class ServiceSettings(BaseSettings):
    """What every service reads."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    database_url: str = Field("", description="SQLAlchemy URL, postgresql+psycopg://…")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix:// URL")
    registry_address: str = Field(
        "127.0.0.1:7101", description="Where the registry listens; commas between several"
    )
    scheduler_address: str = Field(
        "127.0.0.1:7102", description="Where the scheduler listens; commas between several"
    )
    data_dir: Path = Field(Path(".penstock"), description="Folder for files that this service keeps")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"
    otlp_endpoint: str = Field("", description="OTLP/gRPC collector for traces; empty turns traces off")
    metrics_listen: str = Field(
        "", description="host:port of /metrics in Prometheus form; empty turns it off"
    )
    allow_python_runtime: bool = Field(
        False, description="Let models bring their own Python code (runtime python): it runs unconfined"
    )
    allow_compiled_models: bool = Field(
        False,
        description="Let models be compiled code (format aoti): a shared library, which runs unconfined",
    )
    migrate_on_start: bool = Field(
        False, description="Bring the database schema up to date before serving (local mode)"
    )
    max_message_bytes: int = Field(
        64 * 1024 * 1024, ge=1024 * 1024, description="Largest message taken or sent"
    )

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment.

        Raises:
            InvalidArgument: A variable is missing or wrong; the message names it.
        """
        values = dict(overrides)
        for field in cls.model_fields:
            path = os.environ.get(f"{ENV_PREFIX}{field.upper()}_FILE")
            if path and field not in values:
                try:
                    values[field] = Path(path).read_text().strip()
                except OSError as error:
                    raise InvalidArgument(
                        f"{ENV_PREFIX}{field.upper()}_FILE names {path}, which cannot be read: {error}"
                    ) from error
        try:
            return cls(**values)
        except ValidationError as error:
            raise InvalidArgument(
                f"Settings are wrong: {'; '.join(_in_words(e) for e in error.errors())}"
            ) from error


def _in_words(problem: Any) -> str:
    """A problem with the variable that it is about; one of several together names none."""
    words = str(problem["msg"]).removeprefix("Value error, ")
    name = "_".join(str(part) for part in problem["loc"]).upper()
    return f"{ENV_PREFIX}{name}: {words}" if name else words
