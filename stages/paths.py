"""Where the stages read and write, relative to the repository root; dvc.yaml names the same paths."""

from pathlib import Path

PARAMS = Path("params.yaml")

MINIATURE = Path("artifacts/miniature")
CAPTIONS = Path("artifacts/captions")
BACKBONES = Path("artifacts/backbones")
FEATURES = Path("artifacts/features.zarr")
TARGETS = Path("artifacts/targets.zarr")
MODEL = Path("artifacts/model")
INDEX = Path("artifacts/index")
DECISION = Path("artifacts/decision")
EVALUATION = Path("artifacts/evaluation")
REPORT = Path("artifacts/report/index.html")

METRICS = Path("metrics")
