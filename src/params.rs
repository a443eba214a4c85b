//! The parameters of a model: names and shapes over one flat buffer.
//!
//! Weights, gradients, both moments of AdamW and the moving average are five buffers with the same layout, so that an
//! update is one pass over memory and a checkpoint is a walk over the names.

/// Where a parameter lies in the flat buffers. Copied into operations, which panic on a tape whose weights do not reach as far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// First element.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

impl Param {
    /// Its elements as a range.
    #[inline]
    pub fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// Weight and bias of `y = x W^T + b`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[outputs, inputs]`, row-major.
    pub weight: Param,
    /// `[outputs]`.
    pub bias: Param,
    /// Size of `x`.
    pub inputs: usize,
    /// Size of `y`.
    pub outputs: usize,
}

/// Name and shape of a parameter.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The name in the official PyTorch state_dict.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Where it lies.
    pub param: Param,
}

/// All parameters of a model, in the order of their offsets, without gaps.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    len: usize,
}

impl Layout {
    /// Adds a parameter at the end.
    pub fn push(&mut self, name: impl Into<String>, shape: &[usize]) -> Param {
        let param = Param { offset: self.len, len: shape.iter().product() };
        self.entries.push(Entry { name: name.into(), shape: shape.to_vec(), param });
        self.len += param.len;
        param
    }

    /// Adds `NAME.weight` and `NAME.bias` of a linear layer.
    pub fn push_linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Linear {
        let weight = self.push(format!("{name}.weight"), &[outputs, inputs]);
        let bias = self.push(format!("{name}.bias"), &[outputs]);
        Linear { weight, bias, inputs, outputs }
    }

    /// Every parameter, by offset.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Total number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parameter called `name`.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}
