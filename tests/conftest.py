"""torchvision's compiled operators may be missing beside a CPU build of torch; timm imports torchvision."""

import torch
from torchvision_ops import declare_missing_ops

declare_missing_ops()
torch.set_num_threads(1)
