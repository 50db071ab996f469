"""The Dockerfile, as far as it can be checked where no image is built."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from app.serving.gate import _OPEN

ROOT = Path(__file__).parents[1]
KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), with lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_it_is_a_dockerfile() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN
    assert names[:2] == ["ARG", "FROM"]
    for command in of("RUN"):
        shlex.split(command)  # no open quotation mark
    asked = set(re.findall(r"\$\{(\w+)", " ".join(of("RUN") + of("FROM"))))
    assert asked == {argument.split("=")[0] for argument in of("ARG")}
    # A mistake in none of these has to wait for an image to be built.
    other = pytest.importorskip("dockerfile_parse", reason="dockerfile-parse is not installed")
    parsed = other.DockerfileParser(path=str(ROOT / "Dockerfile"))
    assert [one["instruction"] for one in parsed.structure if one["instruction"] != "COMMENT"] == (
        names
    )


def test_it_installs_the_versions_that_were_tested_together() -> None:
    (install,) = [command for command in of("RUN") if "uv pip install" in command]
    assert "--constraint constraints.txt" in install
    extras = next(a for a in of("ARG") if a.startswith("EXTRAS=")).partition("=")[2].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    (version,) = {a.partition("=")[2] for a in of("ARG") if a.startswith("PYTHON=")}
    assert project["project"]["requires-python"] == f">={version}"


def test_it_does_not_run_as_root_and_tells_its_health() -> None:
    names = [name for name, _ in instructions()]
    assert of("USER") == ["gill"]
    assert names.index("USER") < names.index("CMD")
    (health,) = of("HEALTHCHECK")
    route = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", health)
    assert route is not None
    port, path = route.groups()
    assert path in _OPEN
    assert of("EXPOSE") == [port]
    assert f'"--port", "{port}"' in of("CMD")[-1]


def test_every_package_goes_into_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    sent = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    for name in {package.split(".")[0] for package in project["packages"]}:
        assert name in sent
    for module in project["py-modules"]:
        assert any(Path(f"{module}.py").match(pattern) for pattern in sent)
    for name in sent:
        assert list(ROOT.glob(name)), f".dockerignore lets {name} in, which is not there"
