# SPDX-License-Identifier: Apache-2.0
"""Where the targets of the mutants are: the one place to change when code moves."""

from __future__ import annotations

# choice
TOP_K = "vlmprune.core.select:top_k"
PLACE = "vlmprune.core.cutting:_place"
SLICE = "vlmprune.core.pictures:_slice"
ASSIGN = "vlmprune.core.call:assign"
REPLACE_ROWS = "vlmprune.core.call:Placed.replace"

# sequence
POSITIONS = "vlmprune.core.compaction:Compaction.positions"
EXPAND = "vlmprune.core.compaction:Compaction.expand"
COMPACTION = "vlmprune.core.compaction:Compaction.__init__"
FRAME_CUT = "vlmprune.core.frames:Frame.cut"
TYPES_CUT = "vlmprune.core.frames:TokenTypes.cut"
ANGLE_KIND = "vlmprune.core.frames:angle_kind"
SEEN_FRAMES = "vlmprune.core.entrance:Entrance._frames"
TOKEN_TYPES = "vlmprune.core.entrance:Entrance._types"
ENTER = "vlmprune.core.entrance:Entrance.enter"
CUT = "vlmprune.core.entrance:Entrance._cut"
LEAVE = "vlmprune.core.entrance:Entrance.leave"

# cache
SEQ_LENGTH = "vlmprune.core.cache:CutCacheMixin.get_seq_length"
REORDER = "vlmprune.core.cache:CutCacheMixin.reorder_cache"
STATE_COPY = "vlmprune.core.cache:CacheState.__deepcopy__"

# session
SESSION = "vlmprune.core.session:Session.__init__"
CLOSE = "vlmprune.core.session:Session._close"
DETACH = "vlmprune.core.session:Session.detach"
KEEP_MASK = "vlmprune.core.wrappers:KeepMask2D.__call__"

# capture
CAPTURE_REMOVE = "vlmprune.core.capture:VisionCapture.remove"
ATTEND = "vlmprune.core.capture:Record.attend"
ROW_ATTENTION = "vlmprune.core.capture:row_attention"
BLOCK_INDEX = "vlmprune.core.capture:block_index"

# inside the language model
RATERS = "vlmprune.core.inside:InsideHost._find_raters"
LAYER = "vlmprune.core.inside:InsideHost._layer"
VISIBLE = "vlmprune.core.rows:LayerInput.visible"
MARKS_SELECT = "vlmprune.core.reweight:Marks.select"

# methods
FASTV_STAGES = "vlmprune.methods.fastv:FastV.stages"
FASTV_POSITIONS = "vlmprune.methods.fastv:FastV.positions"

# kernels
AT_LEAST = "vlmprune.kernels.cpu:_at_least"
CPU_TOPK = "vlmprune.kernels.cpu:topk_select"
RANKED = "vlmprune.kernels.reference:ranked"
WITH_ENDS = "vlmprune.kernels.reference:with_ends"
RESIDUAL = "vlmprune.kernels.reference:RESIDUAL"
FAKE_KEPT = "vlmprune.kernels.ops:_kept"
GRADIENT_SCATTER = "vlmprune.kernels.ops:_scatter"
NUMBERED = "vlmprune.kernels.eager:_numbered"
UNPRUNE = "vlmprune.kernels.eager:unprune"
EAGER_ROW_SCORES = "vlmprune.kernels.eager:attn_row_scores"
INDICES_INSIDE = "vlmprune.kernels.checks:inside"
BEST = "vlmprune.kernels.cpu_greedy:_best"
NEAREST = "vlmprune.kernels.cpu_greedy:_nearest"
NEAREST_OF_MANY = "vlmprune.kernels.cpu_greedy:_nearest_of_many"
