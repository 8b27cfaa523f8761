#!/bin/sh
# SeuratObject 4.1.3: taking some genes of an object counts its cells' totals anew, over these genes alone, without a word.
#
# x[genes, ] leaves x$nCount_RNA and x$nFeature_RNA with other values than before, and all other columns as they were. So a
# file of the 2,000 variable genes does not hold the cells' library size any more, under the name that says it does, and
# nothing in it shows that: counts per 10,000 of it are of another scale. What to do: x$n_counts <- x$nCount_RNA before.
#
# Needs Rscript with the package SeuratObject (Debian: r-cran-seuratobject). Exits 0 while that is so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.R" <<'R'
suppressMessages(library(SeuratObject))
cat("SeuratObject", as.character(packageVersion("SeuratObject")), "\n")
counts <- as(matrix(c(1, 0, 90, 0, 2, 80), 3, dimnames = list(c("CD3D", "MS4A1", "RPL3"), c("a", "b"))), "CsparseMatrix")
x <- CreateSeuratObject(counts)
x$n_counts <- x$nCount_RNA
selected <- x[c("CD3D", "MS4A1"), ]
print(x[[]])
print(selected[[]])
stopifnot("the totals stay: this finding is over" = all(selected$nCount_RNA == c(1, 2)), all(selected$n_counts == c(91, 82)))
R
Rscript "$folder/try.R"
