//! Notifications: the caller takes part at each stage, and the operation waits for its answer.

use std::sync::{Arc, Mutex, PoisonError};

use floe_image::messages::{CriuNotify, CriuReq, CriuReqType, CriuResp};
use floe_options::{Action, External, HookError, HookEvent, Hooks};

use crate::Channel;

/// Sends each event to the caller.
#[derive(Debug)]
pub struct Notifier {
    /// One question at a time: an answer belongs to the last one.
    channel: Mutex<Arc<Channel>>,
}

impl Notifier {
    /// A notifier over the connection of the request.
    pub fn new(channel: Arc<Channel>) -> Self {
        Self {
            channel: Mutex::new(channel),
        }
    }

    fn ask(&self, event: HookEvent<'_>) -> Result<CriuReq, HookError> {
        let action = event.action;
        let failed = |reason: String| HookError { action, reason };
        let response = CriuResp {
            r#type: CriuReqType::Notify.into(),
            success: true,
            notify: Some(CriuNotify {
                script: Some(action.name().to_owned()),
                pid: event.root_pid.filter(|_| tells_pid(action)),
            }),
            ..CriuResp::default()
        };
        tracing::debug!("asking the caller at {}", action.name());
        // The channel itself is as good after a panic as before.
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = match event.master {
            Some(fd) => channel.send_with(&response, fd),
            None => channel.send(&response),
        };
        sent.map_err(|error| failed(chain(&error)))?;
        match channel.receive().map_err(|error| failed(chain(&error)))? {
            None => Err(failed("the caller closed the connection".into())),
            Some(answer) if CriuReqType::try_from(answer.r#type) != Ok(CriuReqType::Notify) => {
                Err(failed("the caller answered with another request".into()))
            }
            Some(answer) if answer.notify_success != Some(true) => {
                Err(failed("the caller said no".into()))
            }
            Some(answer) => Ok(answer),
        }
    }
}

/// CRIU tells the pid at these two only, and callers take it for the place where they are.
fn tells_pid(action: Action) -> bool {
    matches!(action, Action::SetupNamespaces | Action::PostRestore)
}

impl Hooks for Notifier {
    fn run(&self, event: HookEvent<'_>) -> Result<(), HookError> {
        self.ask(event).map(drop)
    }

    fn watches_dumps(&self) -> bool {
        true
    }

    fn external_files(&self) -> Result<Vec<External>, HookError> {
        let action = Action::QueryExtFiles;
        let answer = self.ask(HookEvent::new(action, None))?;
        let named = answer.opts.map(|opts| opts.external).unwrap_or_default();
        let parsed = named.iter().map(|text| External::parse(text));
        parsed.collect::<Result<_, _>>().map_err(|error| HookError {
            action,
            reason: error.to_string(),
        })
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
