"""The user's images and captions: found, checked, sorted into buckets, cached and dealt out as batches."""
