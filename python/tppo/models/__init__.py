"""What is trained and how it reads tokens: loading, batches, log-probs, rollouts, tokenizers."""
