"""See what heads attend to, and find those that attend in known ways."""

from mlxterp.visualization.copying import detect_copying_heads
from mlxterp.visualization.detection import (
    detect_head_types,
    detect_induction_heads,
    find_attention_pattern,
)
from mlxterp.visualization.heads import (
    AttentionPatternDetector,
    HeadScore,
    HeadScores,
    HeadTypes,
)
from mlxterp.visualization.heatmaps import (
    AttentionVisualizationConfig,
    attention_from_trace,
    attention_heatmap,
)
from mlxterp.visualization.interactive import (
    AttentionPage,
    InteractiveAttentionConfig,
    display_interactive_attention,
    interactive_attention,
    interactive_attention_from_trace,
    save_interactive_attention,
)
from mlxterp.visualization.patterns import get_attention_patterns
from mlxterp.visualization.scores import (
    copying_score,
    current_token_score,
    duplicate_token_score,
    first_token_score,
    induction_score,
    previous_token_score,
)

__all__ = [
    "AttentionPage",
    "AttentionPatternDetector",
    "AttentionVisualizationConfig",
    "HeadScore",
    "HeadScores",
    "HeadTypes",
    "InteractiveAttentionConfig",
    "attention_from_trace",
    "attention_heatmap",
    "copying_score",
    "current_token_score",
    "detect_copying_heads",
    "detect_head_types",
    "detect_induction_heads",
    "display_interactive_attention",
    "duplicate_token_score",
    "find_attention_pattern",
    "first_token_score",
    "get_attention_patterns",
    "induction_score",
    "interactive_attention",
    "interactive_attention_from_trace",
    "previous_token_score",
    "save_interactive_attention",
]
