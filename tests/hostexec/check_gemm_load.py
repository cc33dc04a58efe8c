"""The copies of the GEMMs, by the check of their body: it has a last token and last columns to read beyond."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MUTATIONS = {"gemm_edge": {"asan": "ERROR: AddressSanitizer"}}

_spec = importlib.util.spec_from_file_location("check_gemm_body", Path(__file__).with_name("check_gemm_body.py"))
assert _spec is not None and _spec.loader is not None
_body = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_body)
check = _body.check
