"""What every kind of spec is made of: sections, names, numbers as people write them, and where a run is kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Language = Literal["en", "zh"]  # of the shipped world; both where it is left out
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def _underscored(value: Any) -> Any:
    # YAML reads 5_000_000 as an integer but 1e-3 as a string: accept what people write.
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d_]+(\.\d*)?([eE][+-]?\d+)?", value):
        number = float(value.replace("_", ""))
        return int(number) if number.is_integer() else number
    return value


Count = Annotated[int, BeforeValidator(_underscored), Field(ge=1)]
Real = Annotated[float, BeforeValidator(_underscored)]


class Part(BaseModel):
    """A section of a spec: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(Part):
    uri: str = "./tiger-runs"
    keep: Count = 3


class Tracking(Part):
    """MLflow. `uri` is `sqlite:///file` (a local server is started over it) or `http(s)://server`."""

    uri: str = "sqlite:///tiger-runs/mlflow.db"
    experiment: str = "default"
    parent: str | None = None


class Job(Part):
    """What every kind has. `name` is the run's identity: submitted twice, it resumes."""

    name: Name
    storage: Storage = Storage()
    tracking: Tracking = Tracking()
