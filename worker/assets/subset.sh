#!/usr/bin/env bash
# Makes NotoSansSC-subset.otf: Latin, Cyrillic, punctuation and the characters of characters.txt, nothing else.
# usage: subset.sh NotoSansCJK-Regular.ttc      (Debian: fonts-noto-cjk; pip install fonttools==4.68.0)
set -euo pipefail
cd "$(dirname "$0")"
pyftsubset "$1" --font-number=2 --text-file=characters.txt \
    --unicodes='20-7E,A0-FF,400-45F,2010-2015,2018-201F,2022,2026,2030,2032,2033,2190-2193,2212,2260,2264,2265,20AC,3000-3002,3008-3011,FF01,FF08,FF09,FF0C,FF0E,FF1A,FF1B,FF1F,FF5E' \
    --layout-features='' --no-hinting --name-IDs='0,1,2,3,4,5,6,7,13,14' --drop-tables+=BASE,vhea,vmtx,VORG,DSIG,GPOS,GSUB,GDEF \
    --output-file=NotoSansSC-subset.otf
