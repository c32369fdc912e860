"""One file per library, imported by name: `import dgg_kernels` imports none of them."""
