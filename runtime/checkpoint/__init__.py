"""Checkpoints: sharded, checksummed, committed by a manifest, loadable in any layout. See docs/checkpoints.md."""
