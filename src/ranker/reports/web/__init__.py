"""Parts of HTML pages that load nothing from the network: charts as inline SVG, tables, style and script."""
