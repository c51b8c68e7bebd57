"""Who answers the samples of a cell: this process, or others."""
