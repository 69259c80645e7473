"""Shared by the tests: the real small model, made once from an installed pip package."""
import os
import shutil
from pathlib import Path

import pytest

# Before any test imports torch: small tensors, and threads that wait for a busy core crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct as a Hugging Face folder, 540 MB: $NANOLOGO_CACHE or tests/.cache."""
    import smollm2_from_pip
    folder = Path(os.environ.get("NANOLOGO_CACHE", Path(__file__).parent / ".cache"), "smollm2")
    if not folder.is_dir():
        partial = folder.with_name(f"smollm2.{os.getpid()}")  # renamed when whole: never half a model
        try:
            smollm2_from_pip.convert(partial)
        except (ImportError, ValueError) as error:
            pytest.skip(f"SmolLM2 not available: {error}")
        try:
            partial.rename(folder)
        except OSError:  # another process of the tests was first
            shutil.rmtree(partial)
            assert folder.is_dir()
    return folder
