"""What the SGLang wheel needs in order to import beside a CPU build of torch; import this before ``sglang``.

``SGLANG_USE_CPU_ENGINE`` selects SGLang's own CPU code paths. The torchvision wheel from PyPI cannot load its CUDA
library, so its operators are never registered; the two that torchvision refers to unconditionally are declared here.
"""

import os

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import torch

_TORCHVISION = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _TORCHVISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
