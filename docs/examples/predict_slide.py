import scanpy as sc

import prts

model = prts.Model.load("outputs/demo/make/model")
adata = model.predict("CMU-1-Small-Region.svs", nuclei="watershed")
sc.pl.spatial(adata, color=adata.var["val_pcc"].nlargest(3).index, vmax="p99")
