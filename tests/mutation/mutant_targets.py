# SPDX-License-Identifier: Apache-2.0
"""Where the targets of the mutants are: the one place to change when code moves."""

from __future__ import annotations

# choice
TOP_K = "vlmprune.core.select:top_k"
PLACE = "vlmprune.core.cutting:_place"
SLICE = "vlmprune.core.pictures:_slice"
ASSIGN = "vlmprune.core.call:assign"
REPLACE_ROWS = "vlmprune.core.call:Placed.replace"

CHECK_SCORES = "vlmprune.core.select:_check_scores"
MAKE_UNITS = "vlmprune.core.pictures:make_units"
CHOOSE_UNITS = "vlmprune.core.cutting:choose_units"
PLACE_PICTURES = "vlmprune.core.entrance:Entrance._place"
BOXES = "vlmprune.core.grid:boxes"
PACK_TILES = "vlmprune.core.layout:pack_tiles"
SHARES = "vlmprune.core.grid:_shares"

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

CALL_EXPAND = "vlmprune.core.call:Call.expand"
STACKED = "vlmprune.core.wrappers:Stacked.__call__"
LAYER_KIND = "vlmprune.core.frames:layer_kind"
FRAME_ANGLES = "vlmprune.core.frames:Frame.angles"

# cache
CACHE_ROWS = "vlmprune.core.cache:CutCacheMixin._rows"
CROP = "vlmprune.core.cache:CutCacheMixin.crop"
STATE_OF = "vlmprune.core.cache:state_of"
SEQ_LENGTH = "vlmprune.core.cache:CutCacheMixin.get_seq_length"
REORDER = "vlmprune.core.cache:CutCacheMixin.reorder_cache"
STATE_COPY = "vlmprune.core.cache:CacheState.__deepcopy__"

# session
SESSION = "vlmprune.core.session:Session.__init__"
CLOSE = "vlmprune.core.session:Session._close"
DETACH = "vlmprune.core.session:Session.detach"
KEEP_MASK = "vlmprune.core.wrappers:KeepMask2D.__call__"

DRAFTS = "vlmprune.core.session:Session._drafts"
SERVING = "vlmprune.core.shelf:Shelf.serving"

POLICY = "vlmprune.core.session:Session.policy"
NO_POSITIONS = "vlmprune.core.session:_no_positions"

# capture
RECORD_TAKE = "vlmprune.core.capture:Record.take"
CAPTURE_REMOVE = "vlmprune.core.capture:VisionCapture.remove"
ATTEND = "vlmprune.core.capture:Record.attend"
ROW_ATTENTION = "vlmprune.core.capture:row_attention"
BLOCK_INDEX = "vlmprune.core.capture:block_index"

# inside the language model
RATERS = "vlmprune.core.inside:InsideHost._find_raters"
LAYER = "vlmprune.core.inside:InsideHost._layer"
VISIBLE = "vlmprune.core.rows:LayerInput.visible"
MARKS_SELECT = "vlmprune.core.reweight:Marks.select"

PADDED = "vlmprune.core.inside:_padded"
WEIGH = "vlmprune.core.rows:LayerInput.weigh"
LOGITS = "vlmprune.core.rows:LayerInput.logits"

# methods
FASTERVLM_SCORE = "vlmprune.methods.fastervlm:FasterVLM.score"
DIVPRUNE_GREEDY = "vlmprune.methods.divprune:greedy_maxmin"
VISIONZIP_GROUP = "vlmprune.methods.visionzip:group"
PYRAMIDDROP_STAGES = "vlmprune.methods.pyramiddrop:PyramidDrop.cuts"
AFFINITY = "vlmprune.methods.sparsevlm.raters:rater_affinity"
CANDIDATES = "vlmprune.methods.sparsevlm.recycling:candidate_count"
PEAKS = "vlmprune.methods.sparsevlm.clustering:density_peaks"
HAND_OUT = "vlmprune.methods.holov.quotas:hand_out"
ZOO_SCALED = "vlmprune.methods.zooprune:scaled"
ZOO_KERNEL = "vlmprune.methods.zooprune.sensitivity:_kernel"
VAR_REWEIGHT = "vlmprune.methods.var:VAR.reweight"
VAR_LAYERS = "vlmprune.methods.var:VAR.acts_on"
DEBIAS_SCORE = "vlmprune.methods.debias:Debias.score"
REAL_PATCHES = "vlmprune.methods.debias.padding:real_patches"
RANDOM_ROW = "vlmprune.methods.baselines:Random._row"
CENTRES = "vlmprune.core.grid:centres"

# models
QWEN_WINDOWS = "vlmprune.models.qwen_vl:Qwen2_5VLAdapter.in_order"
QWEN_PACK = "vlmprune.models.qwen_vl:Qwen2VLAdapter.pack"
SHUFFLED_MEAN = "vlmprune.models.internvl:shuffled_mean"
TILE_LAYOUT = "vlmprune.models.llava_next:LlavaNextAdapter.layout"
TILE_VIEW = "vlmprune.models.llava_next:LlavaNextAdapter.view"
TILE_GRIDS = "vlmprune.models.base:tile_grids"
CROP_OF = "vlmprune.models.base:_crop_of"
ADAPTER_CHECK = "vlmprune.models.base:Adapter.check"
IDEFICS_CHECK = "vlmprune.models.idefics3:Idefics3Adapter.check"
CLIP_PACK = "vlmprune.models.llava_video:LlavaNextVideoAdapter.pack"
ONEVISION_CROPS = "vlmprune.models.llava_onevision:LlavaOnevisionAdapter.crops"
GEMMA_PROJECTOR = "vlmprune.models.gemma:AfterPooling.forward"
FASTV_STAGES = "vlmprune.methods.fastv:FastV.cuts"
FASTV_POSITIONS = "vlmprune.methods.fastv:FastV.positions"

# kernels
FORCED = "vlmprune.kernels.backends:forced"
ADDED = "vlmprune.kernels.reference:added"
SEGMENTS = "vlmprune.kernels.checks:segments"
SINGLE = "vlmprune.kernels.dispatch:_single"
GRAM_SCHMIDT = "vlmprune.kernels.cpu_greedy:_gram_schmidt"
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

# benchmarks
SWAP_TEST = "vlmprune.evaluation.stats.table:swap_test"
FLIPS = "vlmprune.evaluation.stats.table:flips"
HARD = "vlmprune.evaluation.stats.table:hard"
HEADLINE = "vlmprune.evaluation.stats.table:headline"
AGAINST_RANDOM = "vlmprune.evaluation.stats.summary:_against_random"
WORST = "vlmprune.evaluation.stats.summary:_worst"
WRITE = "vlmprune.evaluation.leaderboard.journal:_write"
MEND = "vlmprune.evaluation.leaderboard.journal:Journal._mend"
DIGEST = "vlmprune.evaluation.leaderboard.identity:_digest"
APPEND = "vlmprune.evaluation.leaderboard.journal:Journal.append"
PLUGINS = "vlmprune.evaluation.leaderboard.identity:plugins"
SHARDS = "vlmprune.evaluation.leaderboard.plan:shards"
SIDE = "vlmprune.evaluation.leaderboard.verdict:side"
GENERATE = "vlmprune.evaluation.answer.generation:generate"
TAKE = "vlmprune.evaluation.answer.batch:EncodeOnce.take"
NORMALISE = "vlmprune.evaluation.tasks.sample:normalise"
COVERED = "vlmprune.evaluation.stats.objects:covered_share"
UNBELIEVABLE = "vlmprune.evaluation.report.check:_unbelievable"
STALE = "vlmprune.evaluation.report.check:_stale"
INCOMPARABLE = "vlmprune.evaluation.report.check:_incomparable"
RACE = "vlmprune.speed.timing:race"

# pictures that are drawn
DRAW_KEEP = "vlmprune.viz.overlay:draw_keep"

# specs
BUDGET_COUNT = "vlmprune.spec:Budget.count"
