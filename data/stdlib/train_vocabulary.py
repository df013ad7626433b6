"""How data/stdlib/vocabulary.tiktoken was made: byte-pair encoding (Sennrich et al. 2016) over the standard library.

    python data/stdlib/train_vocabulary.py > vocabulary.tiktoken
"""

import base64
import sys
from collections import Counter, defaultdict
from pathlib import Path

import regex  # comes with tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare import GPT2_PATTERN
from data.stdlib.prepare import documents

N_RANKS = 4095  # and end-of-text makes 4,096

counts = Counter(word for text in documents() for word in regex.findall(GPT2_PATTERN, text))
words = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
pair_counts, words_with = Counter(), defaultdict(set)
for at, (parts, count) in enumerate(words):
    for pair in zip(parts, parts[1:]):
        pair_counts[pair] += count
        words_with[pair].add(at)

ranks = [bytes([byte]) for byte in range(256)]
while len(ranks) < N_RANKS:
    best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
    merged = best[0] + best[1]
    ranks.append(merged)
    for at in words_with.pop(best):
        parts, count = words[at]
        for pair in zip(parts, parts[1:]):
            pair_counts[pair] -= count
        at_part = 0
        while at_part < len(parts) - 1:
            if (parts[at_part], parts[at_part + 1]) == best:
                parts[at_part : at_part + 2] = [merged]
            at_part += 1
        for pair in zip(parts, parts[1:]):
            pair_counts[pair] += count
            words_with[pair].add(at)
    del pair_counts[best]

for rank, token in enumerate(ranks):
    print(base64.b64encode(token).decode(), rank)
