"""Shared by the tests: the real small model, made once from an installed pip package."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tensors, and threads that wait for a busy core crawl

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent))
import smollm2_from_pip


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct as a Hugging Face folder; kept in $NANOLOGO_CACHE or tests/.cache (540 MB)."""
    folder = Path(os.environ.get("NANOLOGO_CACHE", Path(__file__).parent / ".cache"), "smollm2")
    if not folder.is_dir():
        partial = folder.with_name(f"smollm2.{os.getpid()}")         # renamed when whole, so never half a model
        try:
            smollm2_from_pip.convert(partial)
        except (ImportError, ValueError) as error:
            pytest.skip(f"SmolLM2 not available: {error}")
        partial.rename(folder)
    return folder
