"""Everything that touches Megatron-Core, and nothing that does not."""

import logging
import warnings

# Megatron-Core says at import which fused kernels it does without; no reader of a training log can act on that.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*", category=UserWarning)
warnings.filterwarnings("ignore", message=".*cuda_graph_scope.*", category=UserWarning)
# Its calls into torch's checkpoint code are those of an older torch.
warnings.filterwarnings("ignore", message=".*load_state_dict. is deprecated.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor.*", category=FutureWarning)
logging.getLogger("megatron").setLevel(logging.ERROR)
