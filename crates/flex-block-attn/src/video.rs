//! Attention over a video whose tokens lie in (time, height, width) order with text behind, while the
//! mask's blocks are its tiles: [`Video`], what [`crate::Options`] is told of it; and how CPUs compute it.
//!
//! On a GPU nothing is copied: kernels fetch tiles where they lie. The CPU puts tokens tile by tile first.
//! There, what does not count, or counts more than once, is a matter of one column more in q and k: the
//! former's is 1, the latter's is added to each of its scores.

use std::marker::PhantomData;

use flex_block_attn_cpu as cpu;
use flex_block_attn_mask::{PlanLayout, PlanView};

use crate::attention::{self, view, view_mut};
use crate::{Error, Gradients, Options, Result, Saved, Tensor, TensorMut};

/// A video in tiles, with text behind.
///
/// The plan's blocks, of queries and of keys, are the tiles in (time, height, width) order, then the
/// text in blocks of as many tokens, the last of which may be short: its lengths are [`Video::places`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Video {
    /// Tokens along (time, height, width). The last tiles may stick out.
    pub thw: [usize; 3],
    /// Tokens of a tile along each axis: a multiple of 16 in all.
    pub tile: [usize; 3],
    /// Tokens of text behind.
    pub text_len: usize,
    /// What fills up tiles that stick out, and the last block of text.
    pub padding: Padding,
}

/// What fills up tiles that stick out, and the last block of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Padding {
    /// Nothing: attention is over the tokens there are.
    Exact,
    /// Tiles zeros, text copies of its last token. They are attended as tokens are.
    Zero,
}

/// Tokens of a video and of text, at most: what comes of them is counted without overflow.
const MOST: usize = 1 << 40;

/// Columns that the CPU adds to q and k.
const MORE: usize = 8;
/// Columns that it takes.
const MOST_COLUMNS: usize = 256;

impl Video {
    /// Tokens of a tile, and of a block of text.
    pub fn block(&self) -> usize {
        self.tile.iter().product()
    }

    /// Tiles along each axis.
    pub fn tiles(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.thw[axis].div_ceil(self.tile[axis]))
    }

    /// Tokens: those of the tensors.
    pub fn tokens(&self) -> usize {
        self.thw.iter().product::<usize>() + self.text_len
    }

    /// Tokens if all tiles were whole: those of the plan and of the lse.
    pub fn places(&self) -> usize {
        self.tiles().iter().product::<usize>() * self.block() + self.text_len
    }

    /// Whether sizes make sense. Only of such a video may be asked what it has.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check_sizes(&self) -> Result<()> {
        let too_large = |sizes: [usize; 3]| {
            let product = sizes.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
            sizes.contains(&0) || product.is_none_or(|all| all > MOST)
        };
        let allowed = "three positive numbers whose product is at most 2^40";
        for (argument, sizes) in [("thw", self.thw), ("tile_thw", self.tile)] {
            if too_large(sizes) {
                return Err(refused(argument, format!("{sizes:?}"), allowed));
            }
        }
        let block = self.block();
        if !block.is_multiple_of(16) {
            let got = format!("{:?}, {block} in all", self.tile);
            return Err(refused("tile_thw", got, "of a multiple of 16 tokens"));
        }
        let places = self.tiles().iter().map(|&n| n as u128).product::<u128>() * block as u128;
        if places + self.text_len as u128 > MOST as u128 {
            let got = self.text_len.to_string();
            let allowed = "at most 2^40 with all tokens of whole tiles";
            return Err(refused("text_len", got, allowed));
        }
        Ok(())
    }

    /// Whether sizes make sense, and a plan is for them.
    pub(crate) fn check(&self, plan: &PlanLayout) -> Result<()> {
        self.check_sizes()?;
        let block = self.block();
        let (extents, places) = (plan.extents, self.places());
        let blocks = [extents.q_block(), extents.kv_block()];
        let lengths = [extents.q_len(), extents.kv_len()];
        if blocks != [block; 2] || lengths != [places; 2] {
            let got = format!("{lengths:?} tokens in blocks of {blocks:?}");
            let allowed = "for all places of the video's tiles and its text, in blocks of a tile's";
            return Err(refused("the plan", got, allowed));
        }
        Ok(())
    }

    /// For each place the token that is there.
    pub(crate) fn order(&self) -> Vec<Option<usize>> {
        let [time, height, width] = self.thw;
        let [a, b, c] = self.tile;
        let [n_t, n_h, n_w] = self.tiles();
        let mut order = Vec::with_capacity(self.places());
        let triples = |t: usize, h: usize, w: usize| {
            (0..t).flat_map(move |i| (0..h).flat_map(move |j| (0..w).map(move |k| [i, j, k])))
        };
        for [i, j, k] in triples(n_t, n_h, n_w) {
            for [t, h, w] in triples(a, b, c) {
                let [t, h, w] = [i * a + t, j * b + h, k * c + w];
                let inside = t < time && h < height && w < width;
                order.push(inside.then_some((t * height + h) * width + w));
            }
        }
        let video = time * height * width;
        order.extend((0..self.text_len).map(|row| Some(video + row)));
        order
    }

    /// What is added to the scores of the keys in a place, before the factor, which is not 0.
    fn bias(&self, place: usize, token: Option<usize>, scale: f64) -> f64 {
        match self.padding {
            // As good as -inf, and a number still.
            Padding::Exact if token.is_none() => (-1e37 / scale).clamp(-1e38, 1e38),
            Padding::Zero if self.text_len > 0 && place + 1 == self.places() => {
                let copies = self.text_len.next_multiple_of(self.block()) - self.text_len;
                (copies as f64).ln_1p() / scale
            }
            _ => 0.0,
        }
    }
}

fn refused(argument: &'static str, got: String, allowed: &'static str) -> Error {
    Error::Video {
        argument,
        got,
        allowed,
    }
}

/// As [`crate::attention`] has it, but for a factor near 0, for which all tokens weigh the same: what is
/// added to scores before they are multiplied must be a number. It is larger than what the backend
/// takes for 0.
fn setting(options: &Options, head_dim: usize) -> cpu::Setting {
    const LEAST_SCALE: f64 = 1e-29;
    let setting = attention::setting(options, head_dim);
    let scale = setting.scale;
    cpu::Setting {
        scale: scale.abs().max(LEAST_SCALE).copysign(scale),
        ..setting
    }
}

/// [`crate::forward`] of a video, whose arguments go together.
pub(crate) fn forward<T>(
    [q, k, v]: [Tensor<'_>; 3],
    plan: PlanView<'_>,
    (video, options): (&Video, &Options),
    out: TensorMut<'_>,
    lse: TensorMut<'_>,
) -> Result<()>
where
    T: cpu::Element,
    T::Real: crate::Element + cpu::Element<Real = T::Real>,
{
    let setting = setting(options, q.shape[3]);
    let order = video.order();
    let tiled = Tiled::<T>::new(&order, q.shape[3])?;
    let [q, k, v] = tiled.inputs([q, k, v], video, setting.scale);
    let mut result = q.like();
    cpu::forward(&cpu::Forward::<T::Real> {
        q: view(q.read()?),
        k: view(k.read()?),
        v: view(v.read()?),
        plan,
        setting,
        out: view_mut(result.write()?),
        lse: view_mut(lse),
    });
    tiled.put(&result, out);
    Ok(())
}

/// Gradients of [`forward`].
pub(crate) fn backward<T>(
    saved: Saved<'_>,
    dout: Tensor<'_>,
    plan: PlanView<'_>,
    (video, options): (&Video, &Options),
    gradients: Gradients<'_>,
) -> Result<()>
where
    T: cpu::Element,
    T::Real: crate::Element + cpu::Element<Real = T::Real>,
{
    let setting = setting(options, saved.q.shape[3]);
    let order = video.order();
    let tiled = Tiled::<T>::new(&order, saved.q.shape[3])?;
    let [q, k, v] = tiled.inputs([saved.q, saved.k, saved.v], video, setting.scale);
    let [out, dout] = [saved.out, dout].map(|x| tiled.of(x, |_| 0.0));
    let (mut dq, mut dk, mut dv) = (q.like(), k.like(), v.like());
    cpu::backward(&cpu::Backward::<T::Real> {
        q: view(q.read()?),
        k: view(k.read()?),
        v: view(v.read()?),
        out: view(out.read()?),
        lse: view(saved.lse),
        dout: view(dout.read()?),
        dlse: None,
        plan,
        setting,
        dq: gradients
            .dq
            .is_some()
            .then(|| dq.write())
            .transpose()?
            .map(view_mut),
        dk: gradients
            .dk
            .is_some()
            .then(|| dk.write())
            .transpose()?
            .map(view_mut),
        dv: gradients
            .dv
            .is_some()
            .then(|| dv.write())
            .transpose()?
            .map(view_mut),
    });
    for (made, wanted) in [(dq, gradients.dq), (dk, gradients.dk), (dv, gradients.dv)] {
        if let Some(wanted) = wanted {
            tiled.put(&made, wanted);
        }
    }
    Ok(())
}

/// Tensors put tile by tile.
struct Tiled<'a, T> {
    order: &'a [Option<usize>],
    columns: usize,
    of: PhantomData<T>,
}

/// Rows in the order of tiles.
struct Rows<R> {
    values: Vec<R>,
    shape: [usize; 4],
}

impl<'a, T> Tiled<'a, T>
where
    T: cpu::Element,
    T::Real: crate::Element,
{
    fn new(order: &'a [Option<usize>], head_dim: usize) -> Result<Self> {
        let columns = head_dim + MORE;
        if columns > MOST_COLUMNS {
            return Err(Error::Video {
                argument: "head_dim",
                got: head_dim.to_string(),
                allowed: "at most 248 on a CPU",
            });
        }
        Ok(Self {
            order,
            columns,
            of: PhantomData,
        })
    }

    fn inputs(&self, [q, k, v]: [Tensor<'_>; 3], video: &Video, scale: f64) -> [Rows<T::Real>; 3] {
        let bias = |place: usize| video.bias(place, self.order[place], scale);
        [self.of(q, |_| 1.0), self.of(k, bias), self.of(v, |_| 0.0)]
    }

    /// A tensor's rows, with a column behind.
    fn of(&self, tensor: Tensor<'_>, more: impl Fn(usize) -> f64) -> Rows<T::Real> {
        let [batch, heads, ..] = tensor.shape;
        Rows {
            values: cpu::gather::<T>(&view(tensor), self.order, self.columns, more),
            shape: [batch, heads, self.order.len(), self.columns],
        }
    }

    /// Writes rows to a tensor, without what was added.
    fn put(&self, rows: &Rows<T::Real>, to: TensorMut<'_>) {
        cpu::scatter::<T>(&rows.values, self.order, self.columns, view_mut(to));
    }
}

impl<R: crate::Element> Rows<R> {
    /// As many others, to be written.
    fn like(&self) -> Self {
        Self {
            values: self.values.clone(),
            shape: self.shape,
        }
    }

    fn read(&self) -> Result<Tensor<'_>> {
        Tensor::new(&self.values, self.shape)
    }

    fn write(&mut self) -> Result<TensorMut<'_>> {
        TensorMut::new(&mut self.values, self.shape)
    }
}
