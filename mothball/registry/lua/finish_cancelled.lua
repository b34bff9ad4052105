-- include: common
-- include: job
-- A run stopped at a checkpoint because it was cancelled. Never a failure of the workspace (Q-36).
--
-- ARGV  1 job   2 fence
-- Returns {'ok', doorbell of the next waiter or {}} | {'lost'}
local id, fence = arg(1), arg(2)
local status, ws, state = run_of(id, fence)
if status == 'done' and state == 'cancelled' then
  return {'ok', {}}
end
if status ~= 'run' then
  return {'lost'}
end
finalise_cancelled(id)
drop_lease(id, ws, fence)
return {'ok', next_waiter(ws)}
