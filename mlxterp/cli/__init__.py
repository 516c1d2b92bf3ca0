"""The command line: `mlxterp train --model NAME --layer 10 --data texts.jsonl`."""
