"""Tests mirror lomo_ds/; `harness` runs functions on warm ranks, `reference` holds independent oracles."""
