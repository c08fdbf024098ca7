"""What members send one another beside bulk memory: headers, and micro-batches packed small."""
