-- include: common
-- include: job
-- Take back what is promised to jobs that do not run. No script leaves such a promise; a record that was deleted by hand does.
--
-- ARGV  1 ... jobs
-- Returns how many reservations were refunded
local refunded = 0
for n = 6, #ARGV do
  local job = ARGV[n]
  if redis.call('HGET', key('job', job), 'state') ~= 'running' then
    refunded = refunded + redis.call('HEXISTS', key('budget', 'reserved'), job)
    budget_refund(job)
  end
end
return refunded
