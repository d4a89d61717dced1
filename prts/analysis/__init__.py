"""Analysis of predicted and measured sections: clusters, cell types, markers, enrichment and their agreement."""
