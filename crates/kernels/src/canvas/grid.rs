//! [`Grid`]: where tokens of a video are, in a kernel.

use flex_block_attn_ptx::{Arg, Builder, Reg};
use flex_block_attn_tile::RegTile;

use super::{HEIGHT, SIDE, TEXT, TIME, TIMES, height, is_text, row, time, width};

/// A canvas in a kernel.
pub(crate) struct Grid<'k> {
    pub(super) k: &'k Builder,
    /// Tokens of a box.
    pub(super) piece: u32,
    /// Tokens of a tile.
    block: Reg<'k, u32>,
    /// Tiles: all, those of one time, and those of one height, too.
    tiles: Reg<'k, u32>,
    plane: Divisor<'k>,
    line: Divisor<'k>,
    /// Boxes: of a tile, of one in a row, and one behind the other in time.
    boxes: Reg<'k, f32>,
    w_boxes: Reg<'k, f32>,
    pub(super) t_boxes: Reg<'k, f32>,
    /// Extents, as spots: of a tile, of the video, of a box.
    pub(super) tile: Reg<'k, u32>,
    end: Reg<'k, u32>,
    pub(super) unit: Reg<'k, u32>,
    /// Logarithms to base 2 of a box's width and height.
    log_w: Reg<'k, u32>,
    log_h: Reg<'k, u32>,
    /// A bit for the first token of each of a box's rows, and of each of its planes.
    rows: Reg<'k, u64>,
    planes: Reg<'k, u64>,
    text_len: Reg<'k, u32>,
    /// 1 if padding of tiles is attended, else 0.
    attended: Reg<'k, u32>,
    /// The row of the text that has a weight, if any has, and what that adds to its scores.
    heavy: Reg<'k, u32>,
    weight: Reg<'k, f32>,
}

/// A walk through the boxes of a tile, or the pieces of a block of text, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'k> {
    /// The tile's spot, and how far behind it the next box is.
    pub(crate) corner: Reg<'k, u32>,
    pub(crate) inner: Reg<'k, u32>,
}

/// A number, and what [`quotient`] asks of it.
#[derive(Clone, Copy)]
struct Divisor<'k> {
    number: Reg<'k, u32>,
    inverse: Reg<'k, f32>,
}

impl<'k> Divisor<'k> {
    fn new(k: &'k Builder, name: &str) -> Self {
        Self {
            number: k.param(name),
            inverse: k.param(&format!("inverse_{name}")),
        }
    }
}

/// The argument for a divisor's inverse.
pub(crate) fn inverse(number: u32) -> Arg {
    Arg::F32(1.0 / number as f32)
}

/// A number below [`MOST_BOXES`] divided, rounded down: an instruction of its own takes more registers
/// than loaders have.
pub(crate) fn quotient<'k>(a: Reg<'k, u32>, inverse: Reg<'k, f32>) -> Reg<'k, u32> {
    // Halves are between the numbers that are asked for: what is rounded to the nearest is never near
    // the middle of two. Adding this leaves no bits for a fraction.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    let middle = (a.to_f32() + 0.5) * inverse - 0.5;
    (middle + WHOLE).to_bits() - WHOLE.to_bits()
}

/// Which of a tensor's rows the token in a place is, of `len`, and whether it is one.
pub(crate) fn token<'k>(
    grid: &Option<Grid<'k>>,
    place: Reg<'k, u32>,
    len: Reg<'k, u32>,
) -> (Reg<'k, u32>, Reg<'k, bool>) {
    match grid {
        None => (place, place.lt(len)),
        Some(grid) => grid.token_at(grid.spot(place)),
    }
}

impl<'k> Grid<'k> {
    /// Declares its parameters.
    pub(crate) fn new(k: &'k Builder, piece: u32) -> Self {
        Self {
            k,
            piece,
            block: k.param("tile_tokens"),
            tiles: k.param("video_tiles"),
            plane: Divisor::new(k, "plane_tiles"),
            line: Divisor::new(k, "line_tiles"),
            boxes: k.param("inverse_boxes"),
            w_boxes: k.param("inverse_w_boxes"),
            t_boxes: k.param("inverse_t_boxes"),
            tile: k.param("tile_thw"),
            end: k.param("video_thw"),
            unit: k.param("box_thw"),
            log_w: k.param("log_w"),
            log_h: k.param("log_h"),
            rows: k.param("box_rows"),
            planes: k.param("box_planes"),
            text_len: k.param("text_len"),
            attended: k.param("attended"),
            heavy: k.param("heavy"),
            weight: k.param("weight"),
        }
    }

    /// A spot behind the video, where copies find zeros.
    pub(crate) fn nowhere(&self) -> Reg<'k, u32> {
        self.end & TIMES
    }

    /// The spot of a tile, or of a block of text.
    pub(crate) fn corner(&self, block: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let corner = k.var((block - self.tiles) * self.block + TEXT);
        k.if_(block.lt(self.tiles), || {
            let t = quotient(block, self.plane.inverse);
            let rest = block - t * self.plane.number;
            let h = quotient(rest, self.line.inverse);
            let w = rest - h * self.line.number;
            let sides = [TIME, HEIGHT, 0].map(|at| match at {
                TIME => self.tile & TIMES,
                at => self.tile & (SIDE << at),
            });
            corner.set(t * sides[0] + h * sides[1] + w * sides[2]);
        });
        corner
    }

    /// Takes the next box of a walk: its spot.
    pub(crate) fn take(&self, walk: Walk<'k>) -> Reg<'k, u32> {
        let Walk { corner, inner } = walk;
        let k = self.k;
        let spot = corner + inner;
        k.if_else(
            is_text(corner),
            || inner.set(inner + self.piece),
            || {
                // The next in time; at the end to the right, at the end of a row down.
                inner.set(inner + (time(self.unit) << TIME));
                k.if_(time(inner).equals(time(self.tile)), || {
                    inner.set((inner & !TIMES) + width(self.unit));
                    k.if_(width(inner).equals(width(self.tile)), || {
                        inner.set(inner + (self.unit & (SIDE << HEIGHT)) - width(self.tile));
                    });
                });
            },
        );
        spot
    }

    /// Whether a token is at a spot: of a box at a spot, whether it has any.
    pub(crate) fn is_inside(&self, spot: Reg<'k, u32>) -> Reg<'k, bool> {
        let video = time(spot).lt(time(self.end))
            & height(spot).lt(height(self.end))
            & width(spot).lt(width(self.end));
        // The time of a spot of the text is behind all of the video's.
        video | (is_text(spot) & row(spot).lt(self.text_len))
    }

    /// The spot of the token in a place of the order of tiles.
    pub(crate) fn spot(&self, place: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let block = quotient(place >> self.piece.ilog2(), self.boxes);
        let token = place - block * self.block;
        let spot = self.corner(block);
        let inside = k.var(token);
        k.if_not(is_text(spot), || {
            let of_unit = self.of_unit(token & (self.piece - 1));
            inside.set(self.unit_at(token >> self.piece.ilog2()) + of_unit);
        });
        spot + inside
    }

    /// How far behind a box's spot its i-th token is.
    fn of_unit(&self, i: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        let low = |log: Reg<'k, u32>| (k.var(1u32) << log) - 1;
        let t = i >> (self.log_w + self.log_h);
        let h = (i >> self.log_w) & low(self.log_h);
        let w = i & low(self.log_w);
        (t << TIME) + (h << HEIGHT) + w
    }

    /// Which of a tensor's rows the i-th token of the box at a spot is, and whether it is one; nothing is
    /// one of a box that has none.
    pub(crate) fn token_of_box(
        &self,
        spot: Reg<'k, u32>,
        i: Reg<'k, u32>,
    ) -> (Reg<'k, u32>, Reg<'k, bool>) {
        let of_box = is_text(spot).select(i, self.of_unit(i));
        let (token, inside) = self.token_at(spot + of_box);
        (token, inside & self.is_inside(spot))
    }

    /// Which of a tensor's rows the token at a spot is, and whether there is one.
    fn token_at(&self, spot: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, bool>) {
        (self.token(spot), self.is_inside(spot))
    }

    /// How far behind a tile's spot its n-th box is.
    fn unit_at(&self, n: Reg<'k, u32>) -> Reg<'k, u32> {
        // Boxes first go on in time, then to the right; at an end back by the tile's extent.
        let place = quotient(n, self.t_boxes);
        let h = quotient(place, self.w_boxes);
        n * (self.unit & TIMES) - place * (self.tile & TIMES)
            + (place << self.log_w)
            + h * ((self.unit & (SIDE << HEIGHT)) - width(self.tile))
    }

    /// The logarithm to base 2 of a box's time.
    pub(super) fn log_t(&self) -> Reg<'k, u32> {
        self.k.var(self.piece.ilog2()) - self.log_w - self.log_h
    }

    /// The spot of the n-th box of a tile, or of a block of text, at a spot.
    pub(crate) fn nth_box(&self, corner: Reg<'k, u32>, n: Reg<'k, u32>) -> Reg<'k, u32> {
        let inside = self.unit_at(n);
        corner + is_text(corner).select(n * self.piece, inside)
    }

    /// Boxes of a tile, and of a block of text, with or without tokens.
    pub(crate) fn boxes_of_tile(&self) -> Reg<'k, u32> {
        self.block >> self.piece.ilog2()
    }

    /// Which token of the tensor is at a spot.
    pub(crate) fn token(&self, spot: Reg<'k, u32>) -> Reg<'k, u32> {
        let [h, w] = [height(self.end), width(self.end)];
        let token = (time(spot) * h + height(spot)) * w + width(spot);
        is_text(spot).select(row(spot) + time(self.end) * h * w, token)
    }

    /// Of a tile, or a block of text: boxes that have a token, and how much padding is attended.
    pub(crate) fn counts(&self, block: Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, u32>) {
        let k = self.k;
        let corner = self.corner(block);
        let keys = (self.text_len - row(corner)).min(self.block);
        let boxes = k.var((keys + (self.piece - 1)) / self.piece);
        let blank = k.var(0u32);
        k.if_not(is_text(corner), || {
            let inside = [time, height, width]
                .map(|along| (along(self.end) - along(corner)).min(along(self.tile)));
            let [t, h, w] = inside;
            let whole = |extent: Reg<'k, u32>, unit: Reg<'k, u32>, log: Reg<'k, u32>| {
                (extent + unit - 1) >> log
            };
            boxes.set(
                whole(t, time(self.unit), self.log_t())
                    * whole(h, height(self.unit), self.log_h)
                    * whole(w, width(self.unit), self.log_w),
            );
            blank.set((self.block - t * h * w) * self.attended);
        });
        (boxes, blank)
    }

    /// Which rows of a box are tokens: a bit each, in words of 32.
    pub(crate) fn bits(&self, spot: Reg<'k, u32>) -> Vec<Reg<'k, u32>> {
        let k = self.k;
        let all = k.var(match self.piece {
            64 => u64::MAX,
            piece => (1 << piece) - 1,
        });
        // The first so many, of up to 64, where there are fewer than a box has.
        let first = |tokens: Reg<'k, u32>, most: Reg<'k, u32>, times: Reg<'k, u64>| {
            k.if_(tokens.lt(most), || {
                let bits = (k.var(1u64) << tokens) - 1u64;
                all.set(all & (bits * times));
            });
        };
        k.if_else(
            is_text(spot),
            || {
                let piece = k.var(self.piece);
                first(self.text_len - row(spot), piece, k.var(1u64));
            },
            || {
                let left = |along: fn(Reg<'k, u32>) -> Reg<'k, u32>| along(self.end) - along(spot);
                let (w, h, t) = (
                    width(self.unit),
                    height(self.unit) << self.log_w,
                    k.var(self.piece),
                );
                first(left(width).min(w), w, self.rows);
                first(left(height).min(SIDE) << self.log_w, h, self.planes);
                let log_plane = self.log_w + self.log_h;
                first(left(time).min(64) << log_plane, t, k.var(1u64));
            },
        );
        let words = [all.to_u32(), (all >> 32).to_u32()];
        words[..self.piece.div_ceil(32) as usize].to_vec()
    }

    /// What copies add to the scores of a token.
    pub(crate) fn weight(&self, spot: Reg<'k, u32>) -> Reg<'k, f32> {
        self.heavy_row(spot).equals(0).select(self.weight, 0f32)
    }

    /// Adds to a tile of scores what copies of the key of one of its columns do.
    pub(crate) fn weigh(&self, scores: &RegTile<'k>, column: Reg<'k, u32>, lane: Reg<'k, u32>) {
        scores.add_to_column(column, lane, self.weight);
    }

    /// Which row of a piece is the one that has a weight: if it is in this piece, less than its rows.
    pub(crate) fn heavy_row(&self, spot: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = self.k;
        is_text(spot).select(k.var(self.heavy) - row(spot), u32::MAX)
    }
}
