"""Who says what is good: labels, words, the rule, agreement, endpoints."""
