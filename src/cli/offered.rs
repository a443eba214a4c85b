//! Values of flags that completions offer.

use std::ffi::OsStr;
use std::str::FromStr;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Command, Error};

/// A parser, and names of values, which `|` separates. It may take others.
#[derive(Clone)]
pub(super) struct Offered<P>(pub(super) String, pub(super) P);

impl<P: TypedValueParser> TypedValueParser for Offered<P> {
    type Value = P::Value;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<P::Value, Error> {
        self.1.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.split('|').map(|name| PossibleValue::new(name.to_string()))))
    }
}

/// What a type parses, with all its names.
pub(super) fn offered<T>(names: &str) -> impl TypedValueParser<Value = T> + use<T>
where
    T: FromStr<Err = crate::error::Error> + Clone + Send + Sync + 'static,
{
    Offered(names.into(), T::from_str)
}
