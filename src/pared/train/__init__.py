"""Training: one loop on Lightning Fabric, callbacks that mix techniques into it, and the step `Train`."""
