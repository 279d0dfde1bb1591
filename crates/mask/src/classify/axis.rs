//! [`Axis`]: the queries or the keys, halved again and again. In: a length and a block size. Out: pieces,
//! each with the ranges of what depends on this axis alone, found once.
//!
//! Blocks are halved to single blocks, and those to pieces of [`SMALL`] tokens, as far as somebody asks.

use std::ops::Range;

use super::interval::Interval;
use super::program::{Program, Region};
use crate::BLOCK_STEP;
use crate::expression::step;

/// Tokens of the smallest pieces, at most.
const SMALL: u32 = BLOCK_STEP as u32;
/// Tokens that are looked at first.
pub(super) const SAMPLES: usize = 3;

/// Which axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Queries,
    Keys,
}

/// Some tokens of an axis.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub start: u32,
    pub end: u32,
    /// Blocks from the first to behind the last; of pieces of a block, its own.
    pub first_block: u32,
    pub end_block: u32,
    /// The first of two that follow each other; 0 if they are not made yet.
    children: u32,
    /// The first of its samples, likewise.
    samples: u32,
    /// Whether its ranges are known.
    is_known: bool,
}

impl Piece {
    fn new(tokens: [u32; 2], blocks: [u32; 2]) -> Self {
        let [start, end] = tokens;
        let [first_block, end_block] = blocks;
        Self {
            start,
            end,
            first_block,
            end_block,
            children: 0,
            samples: 0,
            is_known: false,
        }
    }

    pub fn len(&self) -> u32 {
        self.end - self.start
    }

    pub fn is_block(&self) -> bool {
        self.end_block - self.first_block == 1
    }
}

pub(super) struct Axis {
    side: Side,
    len: u32,
    block: u32,
    pieces: Vec<Piece>,
    /// Those that have been asked for by their blocks.
    whole: Vec<([u32; 2], u32)>,
    /// Those that have been asked for by single blocks: the first of them.
    single: Vec<(Range<u32>, u32)>,
    /// Nodes that depend on this axis alone.
    own: Vec<usize>,
    /// How many of them others ask for.
    asked: usize,
    /// Of each piece those that others ask for.
    ranges: Vec<Interval>,
    /// The piece whose ranges were written last.
    loaded: Option<u32>,
    /// Whether they are the same for all batches and heads.
    is_shared: bool,
}

impl Axis {
    /// `len` is not 0.
    pub fn new(side: Side, len: usize, block: usize, program: &Program<'_>) -> Self {
        let bit = match side {
            Side::Queries => step::on::QUERY,
            Side::Keys => step::on::KEY,
        };
        let axes = step::on::QUERY | step::on::KEY;
        let nodes = 0..program.nodes.len();
        let own: Vec<usize> = nodes
            .filter(|&i| program.depends[i] & axes == bit)
            .collect();
        let asked = program.asked[side as usize].len();
        let is_shared = own.iter().all(|&i| program.depends[i] == bit);
        let (len, block) = (len as u32, block as u32);
        Self {
            side,
            len,
            block,
            pieces: Vec::new(),
            whole: Vec::new(),
            single: Vec::new(),
            own,
            asked,
            ranges: Vec::new(),
            loaded: None,
            is_shared,
        }
    }

    /// A piece of whole blocks, to be halved.
    pub fn blocks(&mut self, first: u32, end: u32) -> u32 {
        let known = self.whole.iter().find(|known| known.0 == [first, end]);
        if let Some(&(_, at)) = known {
            return at;
        }
        // The number 0 is not given away: it says that there is no piece.
        if self.pieces.is_empty() {
            self.push_blocks(first, end);
        }
        let at = self.push_blocks(first, end);
        self.whole.push(([first, end], at));
        at
    }

    /// Pieces of single blocks, which follow each other.
    pub fn singles(&mut self, blocks: Range<u32>) -> Range<u32> {
        let known = self.single.iter().find(|known| known.0 == blocks);
        let first = match known {
            Some(&(_, first)) => first,
            None => {
                let first = self.pieces.len() as u32;
                self.pieces.reserve(blocks.len());
                self.ranges.reserve(blocks.len() * self.asked);
                for block in blocks.clone() {
                    self.push_blocks(block, block + 1);
                }
                self.single.push((blocks.clone(), first));
                first
            }
        };
        first..first + blocks.len() as u32
    }

    fn push_blocks(&mut self, first: u32, end: u32) -> u32 {
        let tokens = [first * self.block, self.len.min(end * self.block)];
        self.push(Piece::new(tokens, [first, end]))
    }

    fn push(&mut self, piece: Piece) -> u32 {
        let at = self.pieces.len() as u32;
        self.pieces.push(piece);
        let ranges = self.pieces.len() * self.asked;
        self.ranges.resize(ranges, Interval::EITHER);
        at
    }

    pub fn piece(&self, at: u32) -> &Piece {
        &self.pieces[at as usize]
    }

    /// Goes to another batch or head.
    pub fn reset(&mut self) {
        self.loaded = None;
        if !self.is_shared {
            for piece in &mut self.pieces {
                piece.is_known = false;
            }
        }
    }

    /// Its halves; itself if it is too small for that.
    pub fn halves(&mut self, at: u32) -> Range<u32> {
        let Piece {
            start,
            end,
            first_block,
            end_block,
            children,
            ..
        } = *self.piece(at);
        if children != 0 {
            return children..children + 2;
        }
        let blocks = end_block - first_block;
        if blocks == 1 && end - start <= SMALL {
            return at..at + 1;
        }
        let children = self.pieces.len() as u32;
        if blocks == 1 {
            let middle = start + ((end - start) / 2).next_multiple_of(SMALL);
            self.push(Piece::new([start, middle], [first_block, end_block]));
            self.push(Piece::new([middle, end], [first_block, end_block]));
        } else {
            // All blocks of a level begin at multiples of their number.
            let middle = first_block + blocks.next_power_of_two() / 2;
            self.push_blocks(first_block, middle);
            self.push_blocks(middle, end_block);
        }
        self.pieces[at as usize].children = children;
        children..children + 2
    }

    /// Pieces of the first token, of the last, and of one between.
    pub fn samples(&mut self, at: u32) -> [u32; SAMPLES] {
        let piece = self.piece(at).clone();
        let mut first = piece.samples;
        if first == 0 {
            first = self.pieces.len() as u32;
            for token in [piece.start, piece.end - 1, piece.start + piece.len() / 2] {
                self.push(Piece::new(
                    [token, token + 1],
                    [piece.first_block, piece.end_block],
                ));
            }
            self.pieces[at as usize].samples = first;
        }
        std::array::from_fn(|i| first + i as u32)
    }

    /// Finds the ranges of a piece, of the nodes that others ask for. `region` has the batch and the
    /// head.
    #[inline]
    pub fn find(
        &mut self,
        at: u32,
        program: &Program<'_>,
        known: &mut [Interval],
        region: &Region,
    ) {
        if !self.pieces[at as usize].is_known {
            self.find_anew(at, program, known, region);
        }
    }

    /// These ranges.
    #[inline]
    pub fn ranges(&self, at: u32) -> &[Interval] {
        self.ranges_of(at..at + 1)
    }

    /// Those of several pieces, which follow each other.
    #[inline]
    pub fn ranges_of(&self, pieces: Range<u32>) -> &[Interval] {
        let Range { start, end } = pieces;
        &self.ranges[start as usize * self.asked..end as usize * self.asked]
    }

    fn find_anew(
        &mut self,
        at: u32,
        program: &Program<'_>,
        known: &mut [Interval],
        region: &Region,
    ) {
        let piece = &mut self.pieces[at as usize];
        piece.is_known = true;
        self.loaded = Some(at);
        let tokens = Interval::new(piece.start.into(), i64::from(piece.end) - 1);
        let region = match self.side {
            Side::Queries => Region {
                query: tokens,
                ..*region
            },
            Side::Keys => Region {
                key: tokens,
                ..*region
            },
        };
        for &node in &self.own {
            known[node] = program.range(node, known, &region);
        }
        let ranges = &mut self.ranges[at as usize * self.asked..][..self.asked];
        for (&node, range) in program.asked[self.side as usize].iter().zip(ranges) {
            *range = known[node];
        }
    }

    /// Writes them where nodes of both axes look for them.
    pub fn load(&mut self, at: u32, program: &Program<'_>, known: &mut [Interval]) {
        if self.loaded == Some(at) {
            return;
        }
        self.loaded = Some(at);
        let ranges = &self.ranges[at as usize * self.asked..];
        for (&node, &range) in program.asked[self.side as usize].iter().zip(ranges) {
            known[node] = range;
        }
    }
}
