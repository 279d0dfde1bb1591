//! stub
mod view;
use flex_block_attn_mask::PlanView;
pub use view::{View, ViewMut};
pub struct Setting {
    pub scale: f64,
    pub threads: std::num::NonZeroUsize,
}
pub trait Element: Copy + Send + Sync {
    type Real;
}
impl Element for f32 {
    type Real = f32;
}
impl Element for f64 {
    type Real = f64;
}
impl Element for half::f16 {
    type Real = f32;
}
impl Element for half::bf16 {
    type Real = f32;
}
pub struct Forward<'a, T: Element> {
    pub q: View<'a, T>,
    pub k: View<'a, T>,
    pub v: View<'a, T>,
    pub plan: PlanView<'a>,
    pub setting: Setting,
    pub out: ViewMut<'a, T>,
    pub lse: ViewMut<'a, T::Real>,
}
pub struct Backward<'a, T: Element> {
    pub q: View<'a, T>,
    pub k: View<'a, T>,
    pub v: View<'a, T>,
    pub out: View<'a, T>,
    pub lse: View<'a, T::Real>,
    pub dout: View<'a, T>,
    pub dlse: Option<View<'a, T::Real>>,
    pub plan: PlanView<'a>,
    pub setting: Setting,
    pub dq: Option<ViewMut<'a, T>>,
    pub dk: Option<ViewMut<'a, T>>,
    pub dv: Option<ViewMut<'a, T>>,
}
pub fn forward<T: Element>(_: Forward<'_, T>) {
    unimplemented!()
}
pub fn backward<T: Element>(_: Backward<'_, T>) {
    unimplemented!()
}
