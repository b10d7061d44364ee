"""Corpora and their shards, and the batches that are packed from them.

Rooms, in reading order: corpus, sources, text_files, hub_corpora, hub, pending_download, parquet_shards,
token_shards, packing, row_stream, train_loader, text_size, tokenizer_texts.
Doors: corpus, hub, packing, sources, text_files, train_loader, text_size, tokenizer_texts.
"""
